package nodes

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
)

// format is the version of the node file. A head refuses a later one rather
// than lose what it doesn't understand. Format 1 had no admission.
const format = 2

type fileContent struct {
	Format int    `json:"format"`
	Nodes  []Node `json:"nodes"`
}

// FileError says that the node file can't be used. The file is left untouched.
type FileError struct {
	Path string
	Err  error
}

func (e *FileError) Error() string {
	return fmt.Sprintf("node file %s: %v\nIt holds the ids handed out so far and was left as it is: repair it, or move it away to hand out ids anew", e.Path, e.Err)
}

func (e *FileError) Unwrap() error { return e.Err }

// readFile returns the machines of the node file; none when there is no file.
func readFile(path string) ([]Node, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &FileError{path, err}
	}
	nodes, err := parse(data)
	if err != nil {
		return nil, &FileError{path, err}
	}
	return nodes, nil
}

func parse(data []byte) ([]Node, error) {
	var c fileContent
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("not the JSON of a node file (byte %d): %w", dec.InputOffset(), err)
	}
	if dec.More() {
		return nil, fmt.Errorf("text after the end of the JSON (byte %d)", dec.InputOffset())
	}
	if c.Format < 1 || c.Format > format {
		return nil, fmt.Errorf("format %d, this program knows 1 to %d", c.Format, format)
	}
	owner, macs := map[int]string{}, map[string]bool{}
	for i, n := range c.Nodes {
		hw := n.MAC.HardwareAddr()
		switch {
		case len(hw) != 6 || hw.String() != string(n.MAC):
			return nil, fmt.Errorf("entry %d: %q is not a MAC", i, n.MAC)
		case n.ID < 0 || n.ID > 255:
			return nil, fmt.Errorf("entry %d (%s): id %d leaves 0..255", i, n.MAC, n.ID)
		case n.Admission != ByPolicy && n.Admission != Admitted && n.Admission != Revoked:
			return nil, fmt.Errorf("entry %d (%s): %q is no admission", i, n.MAC, n.Admission)
		case macs[string(n.MAC)]:
			return nil, fmt.Errorf("entry %d: %s is listed twice", i, n.MAC)
		case owner[n.ID] != "":
			return nil, fmt.Errorf("entry %d: %s has the id %d of %s", i, n.MAC, n.ID, owner[n.ID])
		}
		owner[n.ID], macs[string(n.MAC)] = string(n.MAC), true
	}
	return c.Nodes, nil
}

// save brings the file up to date. It returns when everything that happened
// before the call is on disk.
func (r *Registry) save() error {
	r.saveMu.Lock()
	defer r.saveMu.Unlock()

	r.mu.Lock()
	changes := r.changes
	var nodes []Node
	for _, n := range r.nodes {
		nodes = append(nodes, n.clone())
	}
	r.mu.Unlock()
	slices.SortFunc(nodes, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	if changes == r.saved {
		return nil
	}
	// A row of the table that never showed up is cluster.yaml's business alone.
	kept := nodes[:0]
	for _, n := range nodes {
		if n.Source == Discovered || !n.FirstSeen.IsZero() || n.Admission != ByPolicy {
			kept = append(kept, n)
		}
	}
	data, err := json.MarshalIndent(fileContent{format, kept}, "", "  ")
	if err != nil {
		return fmt.Errorf("node file %s: %w", r.file, err)
	}
	if err := write(r.file, append(data, '\n')); err != nil {
		return fmt.Errorf("node file %s can't be written (is the disk full?): %w", r.file, err)
	}
	r.saved = changes
	return nil
}

// write replaces a file; it is on disk, with its name, when write returns.
func write(path string, data []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := renameio.WriteFile(path, data, 0o600); err != nil { // syncs the file, not the name
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
