"""Drop-in replacements: the names that other projects import, over the ops of this package."""
