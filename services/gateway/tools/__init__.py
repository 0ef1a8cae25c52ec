"""Tools: what a client offers, how models write calls of them, and how calls are read as they are written."""
