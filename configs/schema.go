package configs

import (
	"encoding/json"
	"net/netip"
	"reflect"

	"github.com/invopop/jsonschema"
)

// Schema returns the JSON schema of cluster.yaml (draft 2020-12), for editors
// and for `krgimage config schema`. cluster.schema.json is its committed form;
// `go test ./configs -run TestSchema -update` remakes it.
func Schema() ([]byte, error) {
	r := jsonschema.Reflector{
		Anonymous:                  true,
		DoNotReference:             true,
		RequiredFromJSONSchemaTags: true,
		Mapper:                     scalarSchema,
	}
	s := r.Reflect(Cluster{})
	s.Title = "Configuration of a krgimage cluster"
	defaults, err := Parse("", nil)
	if err != nil {
		return nil, err
	}
	addDefaults(s, reflect.ValueOf(defaults))
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(out, '\n'), nil
}

// scalarSchema describes the types that are texts in the file. The patterns are
// there for editors; Parse knows better.
func scalarSchema(t reflect.Type) *jsonschema.Schema {
	patterns := map[reflect.Type]string{
		reflect.TypeFor[netip.Addr]():   `^([0-9]+(\.[0-9]+){3})?$`,
		reflect.TypeFor[netip.Prefix](): `^[0-9]+(\.[0-9]+){3}/[0-9]+$`,
		reflect.TypeFor[Duration]():     `^([0-9.]+(h|m|s))+$`,
		reflect.TypeFor[Size]():         `^[0-9]+ *(B|KiB|MiB|GiB|TiB)$`,
		reflect.TypeFor[MAC]():          `^[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}$|^[0-9A-Fa-f]{4}(\.[0-9A-Fa-f]{4}){2}$`,
	}
	if p, ok := patterns[t]; ok {
		return &jsonschema.Schema{Type: "string", Pattern: p}
	}
	return nil
}

// addDefaults gives every field that isn't a section of its own its default,
// unless that depends on other fields: then the description says how.
// A single node id may be written as a number, so that list's items are both.
func addDefaults(s *jsonschema.Schema, v reflect.Value) {
	for i := range v.NumField() {
		name := yamlName(v.Type().Field(i))
		p, _ := s.Properties.Get(name)
		if p.Properties != nil && p.Properties.Len() > 0 {
			addDefaults(p, v.Field(i))
			continue
		}
		if name != "head" && name != "discover_ids" {
			p.Default = v.Field(i).Interface()
		}
		if name == "discover_ids" {
			p.Items = &jsonschema.Schema{OneOf: []*jsonschema.Schema{
				{Type: "integer", Minimum: "0", Maximum: "255"},
				{Type: "string", Pattern: `^[0-9]+( *- *[0-9]+)?$`},
			}}
		}
	}
}
