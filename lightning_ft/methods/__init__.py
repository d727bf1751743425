"""One room a method: its maths, its function, its callback, in that order."""
