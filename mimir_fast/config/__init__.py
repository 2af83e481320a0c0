"""What a run depends on: fields with the words of their flags, one configuration per verb, recipes."""
