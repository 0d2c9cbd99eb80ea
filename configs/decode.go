package configs

import (
	"encoding"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// decoder fills a Cluster from the YAML tree. It goes on after an error, so
// that one run tells everything, and it remembers where each value stands, so
// that validation can say it too. (The YAML package's own decoder stops at the
// first error and keeps no places.)
type decoder struct {
	findings Errors
	places   map[string]place // of values and rows, by field path
}

// place is a position in the file, 1-based.
type place struct{ line, column int }

func (d *decoder) bad(at place, field, message, hint string) {
	d.findings = append(d.findings, &Error{
		Line: at.line, Column: at.column, Field: field, Message: message, Hint: hint})
}

// nearest is the place of field or, when the file doesn't have it, of the
// closest thing around it.
func (d *decoder) nearest(field string) place {
	for {
		if at, ok := d.places[field]; ok {
			return at
		}
		i := strings.LastIndexAny(field, ".[")
		if i < 0 {
			return place{}
		}
		field = field[:i]
	}
}

// section is the first part of a field path.
func section(field string) string {
	s, _, _ := strings.Cut(field, ".")
	s, _, _ = strings.Cut(s, "[")
	return s
}

func (d *decoder) root(n ast.Node, c *Cluster) {
	if n == nil {
		return
	}
	d.value("", n, reflect.ValueOf(c).Elem())
}

// value decodes n into v. A null leaves v, and so the default, as it is.
func (d *decoder) value(path string, n ast.Node, v reflect.Value) {
	at := placeOf(n)
	if path != "" {
		d.places[path] = at
	}
	switch n.Type() {
	case ast.NullType:
		return
	case ast.AnchorType, ast.AliasType, ast.TagType, ast.MergeKeyType:
		d.bad(at, path, "YAML anchors, aliases and tags are not supported here", "write the value out")
		return
	}
	if text, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(path, n, v.Type(), text)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.fields(path, n, v)
	case reflect.Slice:
		d.list(path, n, v)
	case reflect.String:
		if s, ok := d.scalar(path, n, "a text"); ok {
			v.SetString(s)
		}
	case reflect.Int:
		if s, ok := d.scalar(path, n, "a whole number"); ok {
			i, err := strconv.Atoi(s)
			// 010 is eight to some YAML readers and ten to others.
			if err != nil || strconv.Itoa(i) != s {
				d.bad(at, path, quote(s)+" is not a whole number", "write decimal digits only")
				return
			}
			v.SetInt(int64(i))
		}
	case reflect.Bool:
		if s, ok := d.scalar(path, n, "true or false"); ok {
			if s != "true" && s != "false" {
				d.bad(at, path, quote(s)+" is not true or false", "")
				return
			}
			v.SetBool(s == "true")
		}
	default:
		panic("configs: no decoding for " + v.Type().String())
	}
}

// fields decodes a mapping into a struct.
func (d *decoder) fields(path string, n ast.Node, v reflect.Value) {
	m, ok := n.(ast.MapNode)
	if !ok {
		hint := "write its fields indented below it: " + strings.Join(fieldNames(v.Type()), ", ")
		d.bad(placeOf(n), path, "expected fields, found "+kindName(n), hint)
		return
	}
	seen := map[string]place{}
	for it := m.MapRange(); it.Next(); {
		key := it.Key()
		at := placeOf(key)
		name, plain := scalarText(key)
		if !plain {
			d.bad(at, path, "a field name must be a plain word", "YAML's merge keys, anchors and tags are not supported here")
			continue
		}
		field := join(path, name)
		if first, twice := seen[name]; twice {
			d.bad(at, field, fmt.Sprintf("written twice, first on line %d", first.line), "keep one of them")
			continue
		}
		seen[name] = at
		i := fieldIndex(v.Type(), name)
		if i < 0 {
			d.bad(at, join(path, display(name)), "unknown field", unknownHint(v.Type(), name))
			continue
		}
		d.value(field, it.Value(), v.Field(i))
	}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if _, ok := seen[yamlName(f)]; !ok && tagged(f, "required") {
			hint := "add it"
			if ex := tagValue(f, "example"); ex != "" {
				hint = fmt.Sprintf("for example '%s: %s'", yamlName(f), ex)
			}
			d.bad(placeOf(n), join(path, yamlName(f)), "missing", hint)
		}
	}
}

// list decodes a sequence; it replaces the default as a whole.
func (d *decoder) list(path string, n ast.Node, v reflect.Value) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		d.bad(placeOf(n), path, "expected a list, found "+kindName(n),
			"write each item on its own line after '- ', or [] for none")
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(s.Values), len(s.Values)))
	for i, item := range s.Values {
		at := fmt.Sprintf("%s[%d]", path, i)
		if item.Type() == ast.NullType {
			d.bad(placeOf(item), at, "empty item", "remove the '-' or write the item after it")
			continue
		}
		d.value(at, item, v.Index(i))
	}
}

// text decodes a scalar into a type that reads itself.
func (d *decoder) text(path string, n ast.Node, t reflect.Type, u encoding.TextUnmarshaler) {
	what, example := textKind(t)
	s, ok := d.scalar(path, n, what)
	if !ok {
		return
	}
	switch err := u.UnmarshalText([]byte(s)); {
	case errors.Is(err, errRange):
		d.bad(placeOf(n), path, quote(s)+" is out of range", "for example "+example)
	case err != nil:
		d.bad(placeOf(n), path, quote(s)+" is not "+what, "for example "+example)
	}
}

func textKind(t reflect.Type) (what, example string) {
	switch t {
	case reflect.TypeFor[netip.Addr]():
		return "an IPv4 address", "10.77.0.254"
	case reflect.TypeFor[netip.Prefix]():
		return "an IPv4 subnet", "10.77.0.0/24"
	case reflect.TypeFor[Duration]():
		return "a time span", "12h, 90m or 600s"
	case reflect.TypeFor[Size]():
		return "a size with a binary unit", "512MiB or 2GiB"
	case reflect.TypeFor[MAC]():
		return "an Ethernet address of six bytes", "52:54:00:4b:52:01"
	}
	panic("configs: no description of " + t.String())
}

// scalar returns the text of a scalar node as it was written, so that a host
// name "007" or a suite "13" stays a text.
func (d *decoder) scalar(path string, n ast.Node, what string) (string, bool) {
	s, ok := scalarText(n)
	if !ok {
		d.bad(placeOf(n), path, "expected "+what+", found "+kindName(n), "")
	}
	return s, ok
}

func scalarText(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode, *ast.NullNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func kindName(n ast.Node) string {
	switch n.Type() {
	case ast.MappingType, ast.MappingValueType:
		return "fields"
	case ast.SequenceType:
		return "a list"
	case ast.IntegerType, ast.FloatType:
		return "a number"
	case ast.BoolType:
		return "true or false"
	}
	return "a text"
}

// placeOf is where a reader would look for n: the first key of a mapping, the
// first dash of a list, the value itself of a scalar.
func placeOf(n ast.Node) place {
	t := n.GetToken()
	switch m := n.(type) {
	case *ast.MappingNode:
		if !m.IsFlowStyle && len(m.Values) > 0 {
			t = m.Values[0].Key.GetToken()
		}
	case *ast.MappingValueNode:
		t = m.Key.GetToken()
	}
	if t == nil || t.Position == nil {
		return place{}
	}
	return place{t.Position.Line, t.Position.Column}
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// quote shows a value in a message, shortened.
func quote(s string) string {
	if r := []rune(s); len(r) > 60 {
		s = string(r[:57]) + "..."
	}
	return strconv.Quote(s)
}

// display shows a field name that the file made up.
func display(s string) string {
	for _, r := range s {
		if !(r == '_' || r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z') {
			return quote(s)
		}
	}
	if s == "" || len(s) > 40 {
		return quote(s)
	}
	return s
}
