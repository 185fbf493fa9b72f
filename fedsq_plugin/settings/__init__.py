"""Options declared once, and recipes read strictly."""
