"""A model on several devices."""
