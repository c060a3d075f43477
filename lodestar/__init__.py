"""The frame both training stages stand on."""
