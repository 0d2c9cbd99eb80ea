package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/images/progress"
)

// part is one piece of an image that is made from inputs and kept by their
// digest.
type part struct {
	name   string // for --rebuild and the directory
	title  string // for people
	inputs any    // everything the result depends on, as JSON
	// make fills dir and returns what to tell people.
	make func(ctx context.Context, dir string, step *progress.Step) (string, error)
}

// partResult is the record of a finished part.
type partResult struct {
	Key       string     `json:"key"`
	Detail    string     `json:"detail"`
	Artefacts []Artefact `json:"artefacts"`
	dir       string
}

const partFile = "part.json"

// workshop makes parts below one directory.
type workshop struct {
	dir     string
	report  *progress.Reporter
	rebuild map[string]bool
	used    map[string]bool // directories this build needs
}

// get returns the finished part, from an earlier build when its inputs are the
// same and nothing in it is missing.
func (w *workshop) get(ctx context.Context, p part) (*partResult, error) {
	step := w.report.Step(p.title)
	key, err := digestJSON(p.inputs)
	if err != nil {
		return nil, step.Fail(err)
	}
	dir := filepath.Join(w.dir, p.name, key)
	w.used[dir] = true
	if !w.rebuild[p.name] {
		if r := loadPart(dir, key); r != nil {
			step.Skip("%s (unchanged)", r.Detail)
			return r, nil
		}
	}
	r, err := w.build(ctx, p, key, dir, step)
	if err != nil {
		return nil, step.Fail(explain(err, w.dir))
	}
	step.Done("%s", r.Detail)
	return r, nil
}

func (w *workshop) build(ctx context.Context, p part, key, dir string, step *progress.Step) (*partResult, error) {
	partial := dir + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(partial, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(partial)
	detail, err := p.make(ctx, partial, step)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.title, err)
	}
	r := &partResult{Key: key, Detail: detail, dir: dir}
	if r.Artefacts, err = describeAll(partial); err != nil {
		return nil, err
	}
	if err := writeJSON(filepath.Join(partial, partFile), r); err != nil {
		return nil, err
	}
	if err := syncTree(partial); err != nil {
		return nil, err
	}
	return r, replaceDir(partial, dir)
}

// loadPart returns nil when the part is not there whole. Sizes are compared,
// not digests: the artefacts' digests are checked when an image is served.
func loadPart(dir, key string) *partResult {
	data, err := os.ReadFile(filepath.Join(dir, partFile))
	if err != nil {
		return nil
	}
	r := &partResult{dir: dir}
	if json.Unmarshal(data, r) != nil || r.Key != key {
		return nil
	}
	for _, a := range r.Artefacts {
		info, err := os.Lstat(filepath.Join(dir, filepath.FromSlash(a.Path)))
		if err != nil || info.Size() != a.Size {
			return nil
		}
	}
	return r
}

func (r *partResult) path(name string) string { return filepath.Join(r.dir, filepath.FromSlash(name)) }

// read decodes a JSON file of the part.
func (r *partResult) read(name string, v any) error {
	data, err := os.ReadFile(r.path(name))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

func (r *partResult) digests() map[string]string {
	m := map[string]string{}
	for _, a := range r.Artefacts {
		m[a.Path] = a.SHA256
	}
	return m
}

// prune removes the parts that this build didn't use.
func (w *workshop) prune() error {
	dirs, err := filepath.Glob(filepath.Join(w.dir, "*", "*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if !w.used[dir] {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// describeAll lists the regular files below dir, in order.
func describeAll(dir string) ([]Artefact, error) {
	var list []Artefact
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		a, err := describe(dir, filepath.ToSlash(rel))
		list = append(list, a)
		return err
	})
	return list, err
}

// replaceDir puts a finished directory in the place of an older one.
func replaceDir(from, to string) error {
	old := to + ".old"
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	if err := os.Rename(to, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return errors.Join(err, os.Rename(old, to))
	}
	return os.RemoveAll(old)
}

// syncTree makes a tree durable before it is renamed into place: syncfs(2) is
// one call where fsync would be thousands.
func syncTree(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("write %s to disk: %w", dir, err)
	}
	return nil
}

func digestJSON(v any) (string, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8]), nil
}

func writeJSON(file string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}

// explain adds to a full disk what a person needs to act on it.
func explain(err error, dir string) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	var st unix.Statfs_t
	free := int64(0)
	if unix.Statfs(dir, &st) == nil {
		free = int64(st.Bavail) * st.Bsize
	}
	return fmt.Errorf("the disk of %s is full (%s free; a build needs about 2 GB): free some space and run the build again, what is finished is kept and the previous image is untouched: %w",
		dir, progress.Size(free), err)
}

// Epoch reads SOURCE_DATE_EPOCH (reproducible-builds.org): seconds since 1970.
func Epoch(env string) (time.Time, error) {
	if env == "" {
		return DefaultEpoch, nil
	}
	var seconds int64
	if _, err := fmt.Sscanf(env, "%d", &seconds); err != nil || seconds < 0 {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is %q: it must be a number of seconds since 1970", env)
	}
	return time.Unix(seconds, 0).UTC(), nil
}
