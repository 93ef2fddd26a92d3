"""What a student is: its configuration, its model, and the delta rule. Importing it registers the Auto classes."""

__version__ = "0.1.0"
