package configs

import (
	"bytes"
	_ "embed"
)

//go:embed template.yaml
var template []byte

// Template returns the commented cluster.yaml that `krgimage init` writes. It
// works as it is and shows every field. A default that need not be set stands
// behind a '#' without a space, explanations behind one with a space.
func Template() []byte { return bytes.Clone(template) }
