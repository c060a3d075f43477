"""What a run reports: metrics, trackers, the console, HTML reports."""
