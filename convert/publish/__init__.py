"""A folder made ready for others: digests, checks, a model card, and the way to the Hub."""
