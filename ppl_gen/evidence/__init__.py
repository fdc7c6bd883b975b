"""Evidence: log p(x), by row and of all the data, whatever learned the program."""
