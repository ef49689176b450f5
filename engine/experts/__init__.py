"""The experts of a mixture: grouped products in place of transformers' loop over them."""
