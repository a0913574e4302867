"""Estimators: where along rays samples are worth taking."""
