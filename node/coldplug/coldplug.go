// Package coldplug loads the kernel modules that a machine's devices ask for.
//
// Every device in sysfs that wants a driver has a file `modalias`; depmap's
// modules.alias says by shell patterns which modules claim it, modules.dep and
// modules.softdep what those need first. Stage 1 uses the package over the few
// modules of the initramfs, PID 1 again over all of the root's modules.
//
// An Index is the text files in memory; it reads and decides, and touches
// nothing. A Loader inserts modules into the running kernel. Listen hears of
// devices that appear later.
package coldplug

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Index is what depmod wrote about one kernel's modules.
type Index struct {
	modules   map[string]module  // by normal name
	builtin   map[string]bool    // by normal name
	soft      map[string]softdep // by normal name
	aliases   map[string][]alias // by the pattern's text before its first wildcard
	blacklist map[string]bool    // by normal name
}

type module struct {
	path string   // below the module directory, for example kernel/net/core/failover.ko.xz
	deps []string // paths of all modules needed, direct and indirect
}

type softdep struct{ pre, post []string }

type alias struct{ pattern, module string }

// normal is the name under which the kernel knows a module: file names and
// dependency lists mix - and _.
func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

// normalPattern is normal for the pattern of an alias, where a - inside
// brackets is a range.
func normalPattern(p string) string {
	b := []byte(p)
	inside := false
	for i, c := range b {
		switch {
		case c == '[':
			inside = true
		case c == ']':
			inside = false
		case c == '-' && !inside:
			b[i] = '_'
		}
	}
	return string(b)
}

// moduleName is the normal name of the module in file p.
func moduleName(p string) string {
	name, _, _ := strings.Cut(path.Base(p), ".ko")
	return normal(name)
}

// ReadIndex reads modules.dep, modules.alias, modules.softdep and
// modules.builtin from a module directory (/lib/modules/RELEASE). Only
// modules.dep must be there.
func ReadIndex(dir fs.FS) (*Index, error) {
	ix := &Index{
		modules: map[string]module{}, builtin: map[string]bool{}, soft: map[string]softdep{},
		aliases: map[string][]alias{}, blacklist: map[string]bool{},
	}
	for _, f := range []struct {
		name string
		line func(string)
	}{
		{"modules.dep", ix.addDep},
		{"modules.alias", ix.addAlias},
		{"modules.softdep", ix.addSoftdep},
		{"modules.builtin", func(l string) { ix.builtin[moduleName(l)] = true }},
	} {
		err := readLines(dir, f.name, f.line)
		if errors.Is(err, fs.ErrNotExist) && f.name != "modules.dep" {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("module index: %w", err)
		}
	}
	return ix, nil
}

func readLines(dir fs.FS, name string, line func(string)) error {
	f, err := dir.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return scan(f, name, line)
}

func scan(r io.Reader, name string, line func(string)) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20) // graphics drivers have long dependency lists
	for s.Scan() {
		if l := strings.TrimSpace(s.Text()); l != "" && l[0] != '#' {
			line(l)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

func (ix *Index) addDep(line string) {
	file, deps, ok := strings.Cut(line, ":")
	if !ok {
		return
	}
	ix.modules[moduleName(file)] = module{path: file, deps: strings.Fields(deps)}
}

func (ix *Index) addAlias(line string) {
	f := strings.Fields(line)
	if len(f) != 3 || f[0] != "alias" {
		return
	}
	pattern := normalPattern(f[1])
	prefix := pattern
	if i := strings.IndexAny(prefix, `*?[\`); i >= 0 {
		prefix = prefix[:i]
	}
	ix.aliases[prefix] = append(ix.aliases[prefix], alias{pattern: pattern, module: normal(f[2])})
}

// addSoftdep reads "softdep MODULE [pre: A B] [post: C]"; names before any
// heading are ignored, as modprobe does.
func (ix *Index) addSoftdep(line string) {
	f := strings.Fields(line)
	if len(f) < 3 || f[0] != "softdep" {
		return
	}
	name := normal(f[1])
	s := ix.soft[name]
	var list *[]string
	for _, w := range f[2:] {
		switch {
		case w == "pre:":
			list = &s.pre
		case w == "post:":
			list = &s.post
		case list != nil:
			*list = append(*list, normal(w))
		}
	}
	ix.soft[name] = s
}

// ReadBlacklist adds the "blacklist MODULE" lines of modprobe.d's *.conf files
// in dir. A blacklisted module isn't loaded for a device, only by name or as
// another's dependency (modprobe.d(5)).
func (ix *Index) ReadBlacklist(dir fs.FS) error {
	files, err := fs.Glob(dir, "*.conf")
	if err != nil {
		return err
	}
	for _, name := range files {
		err := readLines(dir, name, func(l string) {
			if f := strings.Fields(l); len(f) == 2 && f[0] == "blacklist" {
				ix.blacklist[normal(f[1])] = true
			}
		})
		if err != nil {
			return fmt.Errorf("module blacklist: %w", err)
		}
	}
	return nil
}

// Match returns the names of the modules that claim modalias, sorted and
// without the blacklisted ones.
func (ix *Index) Match(modalias string) []string {
	modalias = normal(modalias)
	var names []string
	for i := 0; i <= len(modalias); i++ {
		for _, a := range ix.aliases[modalias[:i]] {
			if !ix.blacklist[a.module] && glob(a.pattern, modalias) {
				names = append(names, a.module)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// ErrNoModule says that a name is neither a module, nor built in, nor an alias.
var ErrNoModule = errors.New("no such kernel module")

// Order lists the files of the module called name and of everything it needs,
// in the order to insert them: soft dependencies to load before, dependencies,
// the module, soft dependencies to load after. Built-in modules don't appear.
// name may also be an alias.
func (ix *Index) Order(name string) ([]string, error) {
	o := order{ix: ix, seen: map[string]bool{}}
	if !o.add(normal(name)) {
		return nil, fmt.Errorf("%s: %w", name, ErrNoModule)
	}
	return o.files, nil
}

type order struct {
	ix    *Index
	seen  map[string]bool
	files []string
}

// add appends name with what it needs. An unknown name is false and adds
// nothing: soft dependencies that don't exist are no error.
func (o *order) add(name string) bool {
	if o.ix.builtin[name] || o.seen[name] {
		return true
	}
	m, ok := o.ix.modules[name]
	if !ok {
		o.seen[name] = true // an alias may lead back to itself
		found := false
		for _, target := range o.ix.Match(name) {
			found = o.add(target) || found
		}
		return found
	}
	o.seen[name] = true
	for _, s := range o.ix.soft[name].pre {
		o.add(s)
	}
	// modules.dep is transitive, with what must come first at the end.
	for _, d := range slices.Backward(m.deps) {
		o.add(moduleName(d))
	}
	o.files = append(o.files, m.path)
	for _, s := range o.ix.soft[name].post {
		o.add(s)
	}
	return true
}

// glob matches s against a pattern of modules.alias: * ? [a-z] and backslash,
// as fnmatch(3) without flags (a * also matches slashes).
func glob(pattern, s string) bool {
	for len(pattern) > 0 {
		switch pattern[0] {
		case '*':
			pattern = strings.TrimLeft(pattern, "*")
			if pattern == "" {
				return true
			}
			for i := 0; i <= len(s); i++ {
				if glob(pattern, s[i:]) {
					return true
				}
			}
			return false
		case '?':
			if s == "" {
				return false
			}
			pattern, s = pattern[1:], s[1:]
		case '[':
			end := strings.IndexByte(pattern[1:], ']')
			if end < 0 || s == "" || !inClass(pattern[1:1+end], s[0]) {
				return false
			}
			pattern, s = pattern[end+2:], s[1:]
		default:
			if pattern[0] == '\\' && len(pattern) > 1 {
				pattern = pattern[1:]
			}
			if s == "" || s[0] != pattern[0] {
				return false
			}
			pattern, s = pattern[1:], s[1:]
		}
	}
	return s == ""
}

func inClass(class string, b byte) bool {
	negated := strings.HasPrefix(class, "!") || strings.HasPrefix(class, "^")
	if negated {
		class = class[1:]
	}
	in := false
	for i := 0; i < len(class); i++ {
		if i+2 < len(class) && class[i+1] == '-' {
			in = in || class[i] <= b && b <= class[i+2]
			i += 2
			continue
		}
		in = in || class[i] == b
	}
	return in != negated
}
