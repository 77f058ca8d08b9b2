"""The directory that an app ships."""
