"""The interactive figures of a report's page."""
