// Package version knows which release this is. It stands alone so that krg,
// which reads no configuration, needn't carry the configuration's packages.
package version

// Version is the release of krgimage and krg; the build sets it (Makefile).
var Version = "dev"
