"""A small world of shapes, colours and facts, in which a small BAGEL can be trained and judged."""
