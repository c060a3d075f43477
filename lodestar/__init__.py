"""What both training stages share: recipes, data, distributed runtime, training loop, reports."""
