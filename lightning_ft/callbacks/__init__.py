"""The Lightning side: the base class of every method's callback, and callbacks any project may use."""
