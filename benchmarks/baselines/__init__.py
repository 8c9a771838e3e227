"""What the library is measured against: the obvious implementations, as examples write them."""
