"""What the library is measured against: the obvious implementations, written the way the field's examples write them."""
