"""What a program computes, captured as a tape of tensor operations, and replayed without the Python that made it."""
