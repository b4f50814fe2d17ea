"""The paper as data: conditions, protocol, conclusions, published numbers."""
