"""What a run would do and cost. Loads without torch."""
