"""What every package uses: errors, checks of configurations, files written whole."""
