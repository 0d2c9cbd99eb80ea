package configs

import (
	"fmt"
	"reflect"
	"strings"
)

// The struct tags are the one list of field names: decoding, hints, the schema
// and the test of the template all read them.

func yamlName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	return name
}

func fieldIndex(t reflect.Type, name string) int {
	for i := range t.NumField() {
		if yamlName(t.Field(i)) == name {
			return i
		}
	}
	return -1
}

func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		names[i] = yamlName(t.Field(i))
	}
	return names
}

// tagged reports whether f's jsonschema tag has the bare word.
func tagged(f reflect.StructField, word string) bool {
	for _, part := range strings.Split(f.Tag.Get("jsonschema"), ",") {
		if part == word {
			return true
		}
	}
	return false
}

// tagValue is the value of key=value in f's jsonschema tag.
func tagValue(f reflect.StructField, key string) string {
	for _, part := range strings.Split(f.Tag.Get("jsonschema"), ",") {
		if v, ok := strings.CutPrefix(part, key+"="); ok {
			return v
		}
	}
	return ""
}

// unknownHint proposes what the author of an unknown field may have meant: a
// field here that is spelt almost so, the same field in another section, or
// else the fields there are.
func unknownHint(t reflect.Type, name string) string {
	if near := nearestWord(name, fieldNames(t)); near != "" {
		return fmt.Sprintf("did you mean %s?", near)
	}
	if where := elsewhere(reflect.TypeFor[Cluster](), "", strings.ReplaceAll(strings.ToLower(name), "-", "_")); where != "" {
		return fmt.Sprintf("there is %s; look at the indentation", where)
	}
	return "the fields here are " + strings.Join(fieldNames(t), ", ")
}

// elsewhere finds the path of the first field called name below t.
func elsewhere(t reflect.Type, path, name string) string {
	for i := range t.NumField() {
		f := t.Field(i)
		at, ft := join(path, yamlName(f)), f.Type
		if yamlName(f) == name {
			return at
		}
		if ft.Kind() == reflect.Slice {
			at, ft = at+"[]", ft.Elem()
		}
		if ft.Kind() == reflect.Struct && ft.PkgPath() == t.PkgPath() {
			if found := elsewhere(ft, at, name); found != "" {
				return found
			}
		}
	}
	return ""
}

// nearestWord is the word that word most probably misspells; empty when none is
// near enough.
func nearestWord(word string, words []string) string {
	word = strings.ReplaceAll(strings.ToLower(word), "-", "_")
	if len(word) > 40 {
		return ""
	}
	best, bestDistance := "", 1+max(1, len(word)/3)
	for _, w := range words {
		if n := editDistance(word, strings.ReplaceAll(w, "-", "_")); n < bestDistance {
			best, bestDistance = w, n
		}
	}
	return best
}

// editDistance counts the insertions, deletions, replacements and swaps of
// neighbours that turn a into b (optimal string alignment).
func editDistance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			n := min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				n = min(n, rows[i-2][j-2]+1)
			}
			rows[i][j] = n
		}
	}
	return rows[len(a)][len(b)]
}
