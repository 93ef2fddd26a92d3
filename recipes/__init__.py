"""The recipes that people run, and the embedded demo teacher (`demo/`), shipped as package data."""
