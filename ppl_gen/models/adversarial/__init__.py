"""Programs that make rows and know no density."""
