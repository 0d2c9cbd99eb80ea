package debian

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// index is what the archive's signed metadata says of its packages.
type index struct {
	byName   map[string][]*entry
	provided map[string][]string // virtual package: names that provide it
}

// entry is one stanza of a Packages file.
type entry struct {
	Package
	mirror    mirror
	component string
	filename  string // below the mirror
	size      int64
	installed int64 // bytes on disk
	sha256    string
	depends   []string
	provides  []string
	essential bool
}

// loadIndex reads the Packages files that apt fetched and verified.
func (r *Repo) loadIndex(ctx context.Context) (*index, error) {
	out, err := r.run(ctx, "package lists", "apt-targets.log", nil, "apt-get", "indextargets",
		"--format", "$(FILENAME)\t$(SITE)\t$(REPO_URI)\t$(COMPONENT)", "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	idx := &index{byName: map[string][]*entry{}, provided: map[string][]string{}}
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSpace(line), "\t")
		if len(fields) != 4 {
			continue
		}
		m, ok := r.mirrorOf(fields[2])
		if !ok {
			return nil, fmt.Errorf("package lists: apt names a mirror that is not configured: %s", fields[2])
		}
		file, err := os.Open(fields[0])
		if os.IsNotExist(err) {
			continue // a component that the suite has no packages in
		}
		if err != nil {
			return nil, err
		}
		err = idx.read(file, m, fields[3], r.cache)
		file.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Base(fields[0]), err)
		}
	}
	if len(idx.byName) == 0 {
		return nil, fmt.Errorf("package lists: %s has no packages for amd64", r.opt.Suite)
	}
	return idx, nil
}

func (r *Repo) mirrorOf(repoURI string) (mirror, bool) {
	for _, m := range r.mirrors {
		if strings.TrimRight(repoURI, "/") == m.aptURL() {
			return m, true
		}
	}
	return mirror{}, false
}

// read adds the stanzas of a Packages file, and tells the cache their checksums.
func (idx *index) read(r io.Reader, m mirror, component string, c *cache) error {
	return stanzas(r, func(s stanza) error {
		e := &entry{
			Package:   s.pkg(),
			mirror:    m,
			component: component,
			filename:  s["Filename"],
			sha256:    s["SHA256"],
			depends:   append(relations(s["Pre-Depends"]), relations(s["Depends"])...),
			provides:  relations(s["Provides"]),
			essential: s["Essential"] == "yes",
		}
		fmt.Sscan(s["Size"], &e.size)
		fmt.Sscan(s["Installed-Size"], &e.installed)
		e.installed *= 1024
		if e.Name == "" || e.filename == "" || e.sha256 == "" {
			return nil
		}
		if !filepath.IsLocal(e.filename) {
			return fmt.Errorf("package %s: file name %q leaves the archive", e.Name, e.filename)
		}
		idx.byName[e.Name] = append(idx.byName[e.Name], e)
		for _, p := range e.provides {
			idx.provided[p] = append(idx.provided[p], e.Name)
		}
		if c != nil {
			if _, key, err := e.location(); err == nil {
				c.expect(key, e.sha256)
			}
		}
		return nil
	})
}

// newest is the highest version of a package.
func (idx *index) newest(name string) (*entry, error) {
	entries := idx.byName[name]
	if len(entries) == 0 {
		return nil, idx.unknown(name)
	}
	return slices.MaxFunc(entries, func(a, b *entry) int { return CompareVersions(a.Version, b.Version) }), nil
}

// check finds a package that cannot be installed by this name.
func (idx *index) check(name string, components []string) error {
	base, _, _ := strings.Cut(name, "=")
	base, _, _ = strings.Cut(base, "/")
	base, _, _ = strings.Cut(base, ":")
	entries := idx.byName[base]
	if len(entries) == 0 {
		if len(idx.provided[base]) > 0 {
			return nil
		}
		return idx.unknown(base)
	}
	for _, e := range entries {
		if slices.Contains(components, e.component) {
			return nil
		}
	}
	return fmt.Errorf("debian.packages: %s is in the component %s\n  fix: add %s to debian.components in cluster.yaml", base, entries[0].component, entries[0].component)
}

// unknown says that there is no such package, and what may have been meant.
func (idx *index) unknown(name string) error {
	near, best := "", 2+len(name)/4
	for candidate := range idx.byName {
		if name == "" || candidate[0] != name[0] {
			continue // people rarely get the first letter wrong
		}
		d := distance(name, candidate, best+1)
		if d < best || d == best && near != "" && candidate < near {
			near, best = candidate, d
		}
	}
	hint := "see packages.debian.org for the name"
	if near != "" {
		hint = "did you mean " + near + "?"
	}
	return fmt.Errorf("debian.packages: no package is called %q in this suite\n  fix: %s", name, hint)
}

// distance is the number of edits between two words, limit when it is no less.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		least := i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost = 1 + min(diagonal, row[j], row[j-1])
			}
			diagonal, row[j] = row[j], cost
			least = min(least, cost)
		}
		if least >= limit {
			return limit
		}
	}
	return min(row[len(b)], limit)
}

// relations are the package names of a relationship field (Debian Policy §7.1):
// the first alternative of each, without versions and architectures.
func relations(field string) []string {
	var names []string
	for item := range strings.SplitSeq(field, ",") {
		item, _, _ = strings.Cut(item, "|")
		item, _, _ = strings.Cut(strings.TrimSpace(item), " ")
		item, _, _ = strings.Cut(item, "(")
		item, _, _ = strings.Cut(item, ":")
		if item != "" {
			names = append(names, item)
		}
	}
	return names
}

// stanza is one paragraph of a control file (Debian Policy §5.1); of folded
// fields only the first line is kept.
type stanza map[string]string

func (s stanza) pkg() Package {
	source, _, _ := strings.Cut(s["Source"], " ")
	if source == s["Package"] {
		source = ""
	}
	return Package{Name: s["Package"], Version: s["Version"], Arch: s["Architecture"], Source: source}
}

// stanzas calls each for every paragraph of a control file.
func stanzas(r io.Reader, each func(stanza) error) error {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 64<<10), 4<<20)
	current := stanza{}
	flush := func() error {
		if len(current) == 0 {
			return nil
		}
		done := current
		current = stanza{}
		return each(done)
	}
	for in.Scan() {
		line := in.Bytes()
		if len(bytes.TrimSpace(line)) == 0 {
			if err := flush(); err != nil {
				return err
			}
			continue
		}
		if line[0] == ' ' || line[0] == '\t' || line[0] == '#' {
			continue
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			return fmt.Errorf("control file: line %.60q has no colon", line)
		}
		if wanted(name) {
			current[string(name)] = string(bytes.TrimSpace(value))
		}
	}
	if err := in.Err(); err != nil {
		return err
	}
	return flush()
}

// wanted keeps an index of 60,000 packages small.
func wanted(field []byte) bool {
	switch string(field) {
	case "Package", "Version", "Architecture", "Source", "Filename", "Size", "Installed-Size", "SHA256",
		"Depends", "Pre-Depends", "Provides", "Essential", "Status":
		return true
	}
	return false
}

// ParseStatus reads a dpkg status file: the packages that are installed, sorted
// by name.
func ParseStatus(r io.Reader) ([]Package, error) {
	var packages []Package
	err := stanzas(r, func(s stanza) error {
		if s["Package"] != "" && strings.HasSuffix(s["Status"], " installed") {
			packages = append(packages, s.pkg())
		}
		return nil
	})
	slices.SortFunc(packages, func(a, b Package) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.Arch, b.Arch)
	})
	return packages, err
}
