"""One file per variant; the registry imports every module of this folder."""
