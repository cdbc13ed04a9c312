"""Problems and the prompts made of them."""
