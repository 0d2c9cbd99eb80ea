package configs

import (
	"slices"

	"github.com/goccy/go-yaml"
)

// Show prints c as YAML with every value, those that follow from others
// included, in the order of the types. Parse reads it back to the same value.
func Show(c Cluster) ([]byte, error) {
	c = c.clone()
	c.derive()
	return yaml.MarshalWithOptions(c, yaml.Indent(2), yaml.IndentSequence(true))
}

// clone copies what derive writes to.
func (c Cluster) clone() Cluster {
	c.Nodes.Table = slices.Clone(c.Nodes.Table)
	c.NFSRoot.Exports = slices.Clone(c.NFSRoot.Exports)
	c.Users = slices.Clone(c.Users)
	for i := range c.Users {
		c.Users[i].Keys = slices.Clone(c.Users[i].Keys)
	}
	c.SSH.Keys = slices.Clone(c.SSH.Keys)
	return c
}
