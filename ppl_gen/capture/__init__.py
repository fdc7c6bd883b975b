"""Recording what a program computes, to replay it without the Python that made it."""
