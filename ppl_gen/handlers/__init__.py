"""Effect handlers that read a program as its author meant it."""
