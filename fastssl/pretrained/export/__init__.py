"""A trained backbone in the formats of other libraries."""
