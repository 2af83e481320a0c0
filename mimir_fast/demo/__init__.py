"""Everything in one go on handwritten digits: pre-train, fine-tune, evaluate, one page."""
