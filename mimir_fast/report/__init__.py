"""What a run has written as one HTML page."""
