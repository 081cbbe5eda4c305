"""Plans, tables, overlays and pages."""
