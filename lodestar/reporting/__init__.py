"""What a run tells: metrics, trackers, the console, HTML reports."""
