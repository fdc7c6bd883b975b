"""What a user writes, what it offers, and the dry run that finds out."""
