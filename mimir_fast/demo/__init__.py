"""Demo on handwritten digits: pre-train, fine-tune and evaluate, with one page of results."""
