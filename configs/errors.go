package configs

import (
	"fmt"
	"strings"
)

// Error is one finding in a configuration file.
type Error struct {
	File    string // name as the caller gave it; empty when the value was not read from a file
	Line    int    // 1-based; 0 when the finding has no place in the file
	Column  int    // 1-based, in characters
	Field   string // for example "nodes.table[1].mac"; empty for the file as a whole
	Message string
	Hint    string // what to do; may be empty

	cause error
}

// Error prints "FILE:LINE:COLUMN: FIELD: MESSAGE", leaving out what is not
// known, and the hint on an indented line of its own.
func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
		}
		b.WriteString(": ")
	}
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Message)
	if e.Hint != "" {
		b.WriteString("\n  hint: " + e.Hint)
	}
	return b.String()
}

// Unwrap returns the operating system's error when the file could not be read.
func (e *Error) Unwrap() error { return e.cause }

// Errors are all the findings of one reading, in the order of the file.
type Errors []*Error

// Error prints every finding on lines of its own.
func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.As find the first *Error and errors.Is a cause.
func (es Errors) Unwrap() []error {
	out := make([]error, len(es))
	for i, e := range es {
		out[i] = e
	}
	return out
}

// err is es as an error: nil when there is none.
func (es Errors) err() error {
	if len(es) == 0 {
		return nil
	}
	return es
}
