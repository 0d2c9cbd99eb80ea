package configs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// MaxFile is the largest configuration file that is read, in bytes. A full
// table of 256 nodes with host names and addresses takes about 35 KiB.
const MaxFile = 128 << 10

// maxDepth bounds the nesting of the YAML tree, which has five levels at most:
// the parser recurses, and it needs memory in the square of the depth.
const maxDepth = 64

// maxFindings bounds what one reading reports.
const maxFindings = 100

// Load reads, checks and completes the configuration file at path. An error is
// of the type Errors.
func Load(path string) (Cluster, error) {
	data, err := readBounded(path)
	if err != nil {
		e := &Error{File: path, Message: "can't be read", cause: err}
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		e.Message = "can't be read: " + err.Error()
		if errors.Is(err, fs.ErrNotExist) {
			e.Message, e.Hint = "there is no such file", "'krgimage init' writes one; --config names another"
		}
		return Cluster{}, Errors{e}
	}
	return Parse(path, data)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxFile+1))
}

// Parse is Load for a text already read; name stands for the file in errors.
// An empty text gives the defaults.
func Parse(name string, data []byte) (Cluster, error) {
	c := Default()
	// The range of ids follows from the subnet unless the file sets it.
	c.Nodes.IDs = nil
	d := &decoder{places: map[string]place{}}
	if body, bad := parseYAML(data); bad != nil {
		d.findings = append(d.findings, bad)
	} else {
		d.root(body, &c)
		c.derive()
		d.validate(&c)
	}
	for _, e := range d.findings {
		e.File = name
	}
	slices.SortStableFunc(d.findings, func(a, b *Error) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	if n := len(d.findings) - maxFindings; n > 0 {
		d.findings = append(d.findings[:maxFindings:maxFindings],
			&Error{File: name, Message: fmt.Sprintf("and %d more findings", n)})
	}
	if err := d.findings.err(); err != nil {
		return Cluster{}, err
	}
	return c, nil
}

// validate adds the findings of Validate with their places. Findings in a
// section that wasn't understood would only be echoes, and so would findings
// about nodes when their network or name wasn't.
func (d *decoder) validate(c *Cluster) {
	broken := map[string]bool{}
	for _, e := range d.findings {
		broken[section(e.Field)] = true
	}
	if broken["network"] || broken["name"] {
		broken["nodes"] = true
	}
	if broken["nodes"] {
		broken["network"] = true
	}
	for _, e := range c.findings() {
		if !broken[section(e.Field)] {
			at := d.nearest(e.Field)
			e.Line, e.Column = at.line, at.column
			d.findings = append(d.findings, e)
		}
	}
}

// parseYAML returns the root node of the one document in data; nil when there
// is nothing but comments.
func parseYAML(data []byte) (body ast.Node, bad *Error) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if len(data) > MaxFile {
		return nil, &Error{Message: fmt.Sprintf("larger than %d KiB", MaxFile>>10),
			Hint: "this isn't a cluster configuration; is it the right file?"}
	}
	if i := badText(data); i >= 0 {
		line := 1 + bytes.Count(data[:i], []byte("\n"))
		col := 1 + utf8.RuneCount(data[bytes.LastIndexByte(data[:i], '\n')+1:i])
		return nil, &Error{Line: line, Column: col, Message: "not UTF-8 text", Hint: "save the file as UTF-8"}
	}
	if line, col, deep := tooDeep(data); deep {
		return nil, &Error{Line: line, Column: col, Message: "nested too deep", Hint: "the file needs five levels; is it the right one?"}
	}
	// The parser reads what people type, and its own fuzzing is young: a panic
	// there must not take a head node down.
	defer func() {
		if r := recover(); r != nil {
			body, bad = nil, &Error{Message: fmt.Sprintf("the YAML parser can't read this (%v)", r)}
		}
	}()
	file, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return nil, syntaxError(err)
	}
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.CommentType {
			continue
		}
		if body != nil {
			at := placeOf(doc.Body)
			return nil, &Error{Line: at.line, Column: at.column, Message: "a second YAML document",
				Hint: "keep one; remove the '---' line between them"}
		}
		body = doc.Body
	}
	return body, nil
}

// badText returns the offset of the first byte that isn't text, -1 if none.
func badText(data []byte) int {
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n <= 1 || r < ' ' && r != '\n' && r != '\r' && r != '\t' {
			return i
		}
		i += n
	}
	return -1
}

// tooDeep finds nesting that no configuration has, before the parser meets it:
// open brackets, indentation, and the signs that open a level within a line.
// Brackets in quotes and comments count as well; nothing real comes near.
func tooDeep(data []byte) (line, column int, deep bool) {
	brackets := 0
	for text := range bytes.Lines(data) {
		line++
		for i, b := range text {
			switch b {
			case '[', '{':
				brackets++
			case ']', '}':
				brackets = max(0, brackets-1)
			}
			if brackets > maxDepth {
				return line, i + 1, true
			}
		}
		body := bytes.TrimLeft(text, " \t")
		if len(body) == 0 || body[0] == '#' || body[0] == '\n' || body[0] == '\r' {
			continue
		}
		signs := 0
		for word := range bytes.FieldsSeq(body) {
			switch word[0] {
			case '-', '?', ':', '!', '&':
				signs++
			}
		}
		if len(text)-len(body) > maxDepth || signs > maxDepth {
			return line, len(text) - len(body) + 1, true
		}
	}
	return 0, 0, false
}

func syntaxError(err error) *Error {
	e := &Error{Message: err.Error()}
	var ye yaml.Error
	if errors.As(err, &ye) {
		e.Message = ye.GetMessage()
		if t := ye.GetToken(); t != nil && t.Position != nil {
			e.Line, e.Column = t.Position.Line, t.Position.Column
		}
	}
	switch {
	case bytes.ContainsAny([]byte(e.Message), "\t") || bytes.Contains([]byte(e.Message), []byte(`'\t'`)):
		e.Hint = "YAML is indented with spaces, not with tabs"
	case bytes.Contains([]byte(e.Message), []byte("value is not allowed in this context")):
		e.Hint = "look at the indentation and at the ':' of this line and the one before; quote a text that holds ': '"
	default:
		e.Hint = "this is not YAML; 'krgimage init' writes a file to start from"
	}
	return e
}
