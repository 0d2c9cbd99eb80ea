package configs

// Version is the release of krgimage and krg; the build sets it (Makefile).
var Version = "dev"
