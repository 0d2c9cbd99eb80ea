// Package live keeps the live shared root: the one directory tree that all
// nodes of a cluster mount over NFS and write to.
//
// An image is made anew at every build; the live root is where people work, so
// it must outlive images. Sync brings the two together:
//
//	no live root yet          unpack the image
//	the same Debian root      put new modules and the overlay (krg and its
//	                          names) in place, file by file
//	another Debian root       unpack it beside the live one, move over what
//	                          people made (home directories, accounts, ...)
//	                          by rename(2), then switch; the old root stays
//	                          as "previous" until the next switch
//
// and after each, every time: accounts, keys, sshd's configuration and the hosts
// table as cluster.yaml has them. Each step can be interrupted at any point; the
// next Sync takes it up again. No node may be up while Sync runs, as nodes cache
// what they have read; the caller's lock on the state directory sees to that.
//
// Root owns the files as they are meant to be. Any other user can have a live
// root too: there owners, modes, devices and links are kept in attributes
// (package meta), which the file server understands. A state directory has the
// one kind or the other.
//
// Below the state directory:
//
//	root/live          symbolic link to the tree in use, root/N-DIGEST
//	root/previous      symbolic link to the tree before the last switch
//	root/N-DIGEST.json what the tree was made of
//	root/N-DIGEST.files.gz  its files as they were made, to tell what people changed
//	root/N-DIGEST.changes   of a previous tree: what was not moved over
//	root/journal.json  a switch under way
//	ssh/               the cluster's host key
//
// Where an existing NFS server has the root, root/ is a directory on that server
// (Input.Trees), and nodes mount the tree in use by its name.
package live

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/images/progress"
	"krgimage/nfsroot/debian/space"
	"krgimage/nfsroot/meta"
)

// Input is what the live root is to be like.
type Input struct {
	State     string          // the cluster's state directory
	Trees     string          // directory of the trees, for example on a mounted filer; STATE/root if empty
	Places    []Place         // directories that nodes have besides the root
	Image     Image           // what to unpack
	Cluster   configs.Cluster // accounts, keys, names
	ExtraKeys []string        // authorized_keys lines for root and every user, for example the head's own
	Hosts     []Host          // nodes for /etc/hosts
	Log       *slog.Logger    // nil: none
}

// Place is a directory of this machine that nodes see in the root.
type Place struct {
	At  string // in the root, absolute
	Dir string // on this machine
}

// Image names the artefacts of an image that make up a root. Base and Modules
// are tar archives compressed with zstd, Overlay may be compressed or not.
type Image struct {
	Base    Artefact // the Debian root
	Modules Artefact // usr/lib/modules/RELEASE
	Overlay Artefact // krg, its names, etc/krgimage/image.json
}

// Artefact is a file and its SHA-256 in hex, with or without "sha256:" before it.
type Artefact struct {
	Path   string
	Digest string
}

// Host is a line of /etc/hosts.
type Host struct {
	Address netip.Addr
	Names   []string // the first is the canonical one
}

// Root is the live root after a Sync.
type Root struct {
	Dir     string // STATE/root/live, resolved
	Kept    bool   // the owners of its files are kept in attributes (package meta)
	HostKey string // public host key of every node's sshd
	Report  Report
}

// Report is what a Sync did, for people.
type Report struct {
	Action    string   `json:"action"`              // "made", "switched", "updated" or "unchanged"
	Kept      []string `json:"kept,omitempty"`      // moved over from the old root
	Packages  []string `json:"packages,omitempty"`  // installed by hand in the old root, not in the new
	Changes   []string `json:"changes,omitempty"`   // other paths made or changed by hand, not moved over
	Conflicts []string `json:"conflicts,omitempty"` // what to look at
	Previous  string   `json:"previous,omitempty"`  // the old tree
}

// Lines are the report in sentences.
func (r Report) Lines() []string {
	var lines []string
	if len(r.Kept) > 0 {
		lines = append(lines, "kept from the old root: "+strings.Join(r.Kept, ", "))
	}
	if len(r.Packages) > 0 {
		lines = append(lines, "installed by hand in the old root and not in the new one: "+strings.Join(r.Packages, " ")+"; add them to debian.packages in cluster.yaml to have them in every image")
	}
	if n := len(r.Changes); n > 0 {
		shown := r.Changes[:min(n, 8)]
		line := fmt.Sprintf("made or changed by hand in the old root and not moved over: %s", strings.Join(shown, " "))
		if n > len(shown) {
			line += fmt.Sprintf(" and %d more (%s.changes)", n-len(shown), r.Previous)
		}
		lines = append(lines, line)
	}
	lines = append(lines, r.Conflicts...)
	if r.Previous != "" {
		lines = append(lines, "the old root is kept until the next switch: "+r.Previous)
	}
	return lines
}

// record is what is known of a tree, in root/ID.json.
type record struct {
	Base    string `json:"base"`    // digest
	Modules string `json:"modules"` // digest
	// Overlay is the digest of the overlay; empty while one is being put in
	// place, so that it is done again after an interruption.
	Overlay      string   `json:"overlay"`
	OverlayFiles []string `json:"overlay_files"`
	Releases     []string `json:"releases"` // kernel releases with modules, oldest first
	Packages     []string `json:"packages"` // installed when it was made
	Users        []string `json:"users"`    // accounts that came from cluster.yaml
}

// syncer is one Sync at work.
type syncer struct {
	in    Input
	dir   string    // STATE/root
	trees meta.Root // of dir
	kept  bool      // without root: owners are in attributes
	loose bool      // dir keeps no extended attributes
	log   *slog.Logger
	rep   *progress.Reporter
	// at is called between the steps of a switch; tests stop there.
	at func(point string) error
}

// Sync makes the live root what the input says and returns it.
func Sync(ctx context.Context, in Input, rep *progress.Reporter) (Root, error) {
	return syncRoot(ctx, in, rep, func(string) error { return nil })
}

func syncRoot(ctx context.Context, in Input, rep *progress.Reporter, at func(string) error) (Root, error) {
	root := os.Geteuid() == 0
	switch {
	case in.Trees != "" && !root:
		return Root{}, errors.New("nfsroot.mounted: the files of a root on another server belong to many users, which takes root\n  fix: run it with sudo, or leave the setting out for a trial")
	case len(in.Places) > 0 && !root:
		return Root{}, errors.New("nfsroot.exports: directories of this machine have files of many users, and serving them takes root\n  fix: run it with sudo, or leave the setting out for a trial")
	case in.Trees == "":
		if err := Preflight(in.State); err != nil {
			return Root{}, err
		}
	}
	for _, a := range []Artefact{in.Image.Base, in.Image.Modules, in.Image.Overlay} {
		if digest := plainDigest(a.Digest); len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" {
			return Root{}, fmt.Errorf("live root: %s comes with the digest %q, which is no SHA-256", a.Path, a.Digest)
		}
	}
	s := &syncer{in: in, dir: cmp.Or(in.Trees, filepath.Join(in.State, "root")), rep: cmp.Or(rep, progress.Discard()), at: at, kept: !root}
	s.log = cmp.Or(in.Log, slog.New(slog.DiscardHandler)).With("component", "live")
	if in.Trees != "" {
		var err error
		if s.loose, err = checkServer(s.dir); err != nil {
			return Root{}, err
		}
	} else if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return Root{}, err
	}
	key, err := ensureHostKey(filepath.Join(in.State, "ssh"), in.Cluster.Name)
	if err != nil {
		return Root{}, err
	}
	if s.kept {
		if err := meta.Supported(s.dir); err != nil {
			return Root{}, err
		}
	}
	s.trees, err = meta.Open(s.dir, s.kept)
	if err != nil {
		return Root{}, err
	}
	defer s.trees.Close()
	step := s.rep.Step("Live root")
	report, id, err := s.sync(ctx, step, key)
	if err != nil {
		err = space.Explain(err, "the live root is unpacked", s.dir, 0)
		return Root{}, step.Fail(fmt.Errorf("live root: %w", err))
	}
	if report.Action == "unchanged" {
		step.Skip("unchanged")
	} else {
		step.Done("%s (%s)", report.Action, id)
	}
	return Root{Dir: filepath.Join(s.dir, id), Kept: s.kept, HostKey: key.public, Report: report}, nil
}

// Preflight says whether the caller can have a live root in a state directory:
// not where one of the other kind, or another user's, is.
func Preflight(state string) error {
	dir := filepath.Join(state, "root")
	for _, at := range []string{state, dir, filepath.Join(dir, "live")} {
		info, err := os.Stat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case errors.Is(err, fs.ErrPermission):
			return fmt.Errorf("the live root in %s belongs to another user, or to root\n  fix: run it as that user, or use a state directory of your own (--state)", state)
		case err != nil:
			return err
		}
		uid := owner(info)[0]
		if me := os.Geteuid(); me != 0 && me != uid {
			return fmt.Errorf("%s belongs to the user with uid %d, and this is %d\n  fix: run it as that user (sudo for root), or use a state directory of your own (--state)", at, uid, me)
		}
	}
	live := filepath.Join(dir, "live")
	info, err := os.Stat(live)
	if err != nil {
		return err
	}
	kept, err := meta.Marked(live)
	switch uid := owner(info)[0]; {
	case err != nil:
		return err
	case kept && os.Geteuid() == 0:
		return fmt.Errorf("the live root in %s was made without root, by the user with uid %d: the owners of its files are not those on disk\n  fix: run it as that user; or, for a root of root's, use another state directory (--state) or remove %s to start with a fresh one", state, uid, dir)
	case !kept && os.Geteuid() != 0:
		return fmt.Errorf("the live root in %s has no attributes with the owners of its files: it was copied, or made by root and given away\n  fix: use another state directory (--state), or remove %s to start with a fresh one", state, dir)
	}
	return nil
}

func (s *syncer) sync(ctx context.Context, step *progress.Step, key hostKey) (Report, string, error) {
	if err := s.clean(); err != nil {
		return Report{}, "", err
	}
	resumed, err := s.resume(ctx, step)
	if err != nil {
		return Report{}, "", err
	}
	id, rec, err := s.current()
	if err != nil {
		return Report{}, "", err
	}
	if id != "" {
		if err := s.precheck(id, rec); err != nil {
			return Report{}, "", err
		}
	}
	var report Report
	switch {
	case id == "" || rec.Base != plainDigest(s.in.Image.Base.Digest):
		next, err := s.unpack(ctx, step)
		if err != nil {
			return Report{}, "", err
		}
		report, err = s.switchTo(ctx, step, id, next)
		if err != nil {
			return Report{}, "", err
		}
		id = next
	default:
		report, err = s.update(ctx, step, id, rec)
		if err != nil {
			return Report{}, "", err
		}
		if resumed != nil {
			report = *resumed
		}
	}
	conflicts, err := s.configure(id, key)
	report.Conflicts = append(report.Conflicts, conflicts...)
	return report, id, err
}

// clean removes trees whose unpacking was interrupted.
func (s *syncer) clean() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".partial") {
			if err := s.removeTree(e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeTree removes a tree of ours, unless a file system is mounted in it.
func (s *syncer) removeTree(name string) error {
	path := filepath.Join(s.dir, name)
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), " "+path+"/") || strings.Contains(string(mounts), " "+path+" ") {
		return fmt.Errorf("a file system is mounted in %s, which is to be removed\n  fix: unmount it (findmnt -R %s shows it)", path, path)
	}
	return s.trees.RemoveAll(name)
}

// current is the tree in use and its record; no id when there is none.
func (s *syncer) current() (string, record, error) {
	id, err := s.trees.Readlink("live")
	if errors.Is(err, fs.ErrNotExist) {
		return "", record{}, nil
	}
	if err != nil {
		return "", record{}, err
	}
	if !isID(id) {
		return "", record{}, fmt.Errorf("%s points to %q, which is no tree of krgimage's\n  fix: move it aside", filepath.Join(s.dir, "live"), id)
	}
	if info, err := s.trees.Lstat(id); err != nil || !info.IsDir() {
		return "", record{}, fmt.Errorf("%s points to %s, which is missing\n  fix: bring it back, or remove the link to start with a fresh root", filepath.Join(s.dir, "live"), id)
	}
	rec, err := s.record(id)
	return id, rec, err
}

func (s *syncer) record(id string) (record, error) {
	var rec record
	text, err := s.trees.ReadFile(id + ".json")
	if errors.Is(err, fs.ErrNotExist) {
		return rec, nil // all digests unknown: a switch puts it right
	}
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(text, &rec); err != nil {
		s.log.Warn("a tree's record is damaged; it counts as unknown", "tree", id, "err", err)
		return record{}, nil
	}
	return rec, nil
}

func (s *syncer) writeRecord(id string, rec record) error { return s.writeJSON(id+".json", rec) }

func (s *syncer) writeJSON(name string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(s.dir, name), append(text, '\n'), 0o644)
}

// newID is the name of the next tree: a number that no tree had, and the
// digest's beginning.
func (s *syncer) newID(digest string) (string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return "", err
	}
	last := 0
	for _, e := range entries {
		number, _, _ := strings.Cut(e.Name(), "-")
		if n, err := strconv.Atoi(number); err == nil {
			last = max(last, n)
		}
	}
	return fmt.Sprintf("%d-%.12s", last+1, digest), nil
}

// isID holds for the names that newID makes.
func isID(name string) bool {
	number, digest, ok := strings.Cut(name, "-")
	_, err := strconv.Atoi(number)
	return ok && err == nil && digest != "" && !strings.ContainsAny(digest, "/.")
}

func plainDigest(digest string) string { return strings.TrimPrefix(digest, "sha256:") }

// flush makes everything written below dir last before what is renamed next.
func flush(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// precheck finds accounts of cluster.yaml that clash with accounts made on the
// cluster, before anything is changed.
func (s *syncer) precheck(id string, rec record) error {
	root, err := s.trees.OpenRoot(id)
	if err != nil {
		return err
	}
	defer root.Close()
	a, err := readAccounts(root)
	if err != nil {
		return err
	}
	_, err = a.configure(s.in.Cluster.Users, rec.Users)
	return err
}

// configure is the part of a Sync that every Sync does: what comes from
// cluster.yaml and not from the image.
func (s *syncer) configure(id string, key hostKey) ([]string, error) {
	root, err := s.trees.OpenRoot(id)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	rec, err := s.record(id)
	if err != nil {
		return nil, err
	}
	if err := makePlaces(root, s.in.Places); err != nil {
		return nil, err
	}
	homes, err := s.homes(root)
	if err != nil {
		return nil, err
	}
	defer homes.Close()
	gone, err := configureAccounts(root, homes, s.in.Cluster.Users, rec.Users)
	if err != nil {
		return nil, err
	}
	var notes []string
	for _, name := range gone {
		notes = append(notes, fmt.Sprintf("account %s is no longer in cluster.yaml and was removed; /home/%s is kept", name, name))
	}
	users := []string{}
	for _, u := range s.in.Cluster.Users {
		users = append(users, u.Name)
	}
	if !slices.Equal(users, rec.Users) {
		rec.Users = users
		if err := s.writeRecord(id, rec); err != nil {
			return notes, err
		}
	}
	return notes, writeManaged(root, s.in, key)
}
