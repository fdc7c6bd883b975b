"""What is drawn of a fit: posteriors of given rows, predictions, new rows."""
