"""What trained the small reference models in `models/`; none of it is needed to run them."""
