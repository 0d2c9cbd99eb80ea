package live

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"

	"krgimage/images/progress"
	"krgimage/nfsroot/debian/tarfs"
)

// keptPaths are moved over from an old root to a new one as they are.
func keptPaths() []string {
	return []string{
		"home", "root", "srv", "opt", "usr/local",
		"var/chkpt", "var/mail", "var/spool/cron",
	}
}

// journal is a switch under way (root/journal.json). Everything it needs to be
// taken up again is in it; each step finds out by itself what is done.
type journal struct {
	From   string   `json:"from"`
	To     string   `json:"to"`
	Paths  []string `json:"paths"` // kept paths that the old root had
	Report Report   `json:"report"`
}

// switchTo makes next the live tree, after what people made in the tree from
// has moved over. from is empty for the first root.
func (s *syncer) switchTo(ctx context.Context, step *progress.Step, from, next string) (Report, error) {
	if from == "" {
		return Report{Action: "made"}, s.link(next)
	}
	j, err := s.plan(ctx, from, next)
	if err != nil {
		return Report{}, errors.Join(err, s.discard(next))
	}
	if err := s.writeJSON("journal.json", j); err != nil {
		return Report{}, err
	}
	return s.finish(ctx, step, j)
}

// resume takes up a switch that was interrupted; nil when there is none.
func (s *syncer) resume(ctx context.Context, step *progress.Step) (*Report, error) {
	text, err := s.trees.ReadFile("journal.json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var j journal
	if err := json.Unmarshal(text, &j); err != nil || !isID(j.From) || !isID(j.To) {
		return nil, fmt.Errorf("%s is damaged: a switch from one root to another was interrupted\n  fix: move /home and the like by hand to the tree that is to be live, then remove the journal", filepath.Join(s.dir, "journal.json"))
	}
	s.log.Info("taking up an interrupted switch", "from", j.From, "to", j.To)
	report, err := s.finish(ctx, step, j)
	return &report, err
}

// discard removes a tree that did not become live.
func (s *syncer) discard(id string) error {
	if err := s.removeTree(id); err != nil {
		return err
	}
	for _, suffix := range []string{".json", ".files.gz", ".changes"} {
		if err := s.trees.Remove(id + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// plan finds what is to be moved, and what can't be, before anything changes.
func (s *syncer) plan(ctx context.Context, from, next string) (journal, error) {
	j := journal{From: from, To: next, Report: Report{Action: "switched", Previous: filepath.Join(s.dir, from)}}
	there, err := s.trees.Stat(next)
	if err != nil {
		return j, err
	}
	paths := keptPaths()
	keys, err := fs.Glob(s.trees.FS(), from+"/etc/ssh/ssh_host_*")
	if err != nil {
		return j, err
	}
	for _, key := range keys {
		if name := path.Base(key); !strings.HasPrefix(name, hostKeyFile) { // ours comes from STATE/ssh
			paths = append(paths, "etc/ssh/"+name)
		}
	}
	for _, p := range paths {
		info, err := s.trees.Lstat(path.Join(from, p))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return j, err
		}
		if device(info) != device(there) {
			return j, fmt.Errorf("/%s of the live root is a file system of its own, which cannot be moved to the new root\n  fix: unmount %s and mount it in the new root afterwards", p, filepath.Join(s.dir, from, p))
		}
		j.Paths = append(j.Paths, p)
		if target, err := s.trees.Readlink(path.Join(from, p)); err == nil {
			j.Report.Conflicts = append(j.Report.Conflicts, fmt.Sprintf("/%s is a link to %s: the link was kept, what it points to stays in the old root", p, target))
		}
		if info.IsDir() {
			j.Report.Kept = append(j.Report.Kept, "/"+p)
		}
	}
	if err := s.compare(ctx, &j); err != nil {
		return j, fmt.Errorf("compare the old root: %w", err)
	}
	return j, nil
}

// finish does the steps of a switch that are not done yet. Every step may have
// been done before, in whole or in part.
func (s *syncer) finish(ctx context.Context, step *progress.Step, j journal) (Report, error) {
	step.Note("moving over what people made")
	displaced := j.To + ".displaced"
	if err := s.at("journal"); err != nil {
		return Report{}, err
	}
	for _, p := range j.Paths {
		if err := s.move(j, displaced, p); err != nil {
			return Report{}, fmt.Errorf("move /%s to the new root: %w", p, err)
		}
		if err := s.at("moved " + p); err != nil {
			return Report{}, err
		}
	}
	kept, conflicts, err := s.mergeAccounts(j)
	if err != nil {
		return Report{}, fmt.Errorf("merge the accounts: %w", err)
	}
	// A repeated merge finds nothing new; the first one's words count.
	if len(kept) > 0 || len(conflicts) > 0 {
		j.Report.Kept = append(j.Report.Kept, kept...)
		j.Report.Conflicts = append(j.Report.Conflicts, conflicts...)
		if err := s.writeJSON("journal.json", j); err != nil {
			return Report{}, err
		}
	}
	if err := s.at("accounts"); err != nil {
		return Report{}, err
	}
	if err := s.overlayAgain(ctx, step, j.To); err != nil {
		return Report{}, err
	}
	if err := s.at("overlay"); err != nil {
		return Report{}, err
	}
	if err := flush(s.dir); err != nil {
		return Report{}, err
	}
	if err := s.link(j.To); err != nil {
		return Report{}, err
	}
	if err := s.at("linked"); err != nil {
		return Report{}, err
	}
	if old, err := s.trees.Readlink("previous"); err == nil && isID(old) && old != j.From && old != j.To {
		step.Note("removing the root before the last")
		if err := s.discard(old); err != nil {
			return Report{}, err
		}
	}
	if err := renameio.Symlink(j.From, filepath.Join(s.dir, "previous")); err != nil {
		return Report{}, err
	}
	if err := s.at("previous"); err != nil {
		return Report{}, err
	}
	if err := s.trees.RemoveAll(displaced); err != nil {
		return Report{}, err
	}
	if err := s.trees.Remove("journal.json"); err != nil {
		return Report{}, err
	}
	return j.Report, flush(s.dir)
}

// link points root/live to a tree.
func (s *syncer) link(id string) error {
	if err := renameio.Symlink(id, filepath.Join(s.dir, "live")); err != nil {
		return err
	}
	return flush(s.dir)
}

// move brings a kept path from the old tree to the new one:
//
//	old/p  new/p      at the start
//	old/p  displaced/p    the new root's own is out of the way
//	new/p  displaced/p    moved
//	new/p                 what only the new root had is back in
func (s *syncer) move(j journal, displaced, p string) error {
	from, to, aside := path.Join(j.From, p), path.Join(j.To, p), path.Join(displaced, p)
	left, err := exists(s.trees, from)
	if err != nil {
		return err
	}
	if left {
		if there, err := exists(s.trees, to); err != nil {
			return err
		} else if there {
			if err := s.trees.MkdirAll(path.Dir(aside), 0o700); err != nil {
				return err
			}
			if err := s.trees.Rename(to, aside); err != nil {
				return err
			}
		}
		if err := s.at("displaced " + p); err != nil {
			return err
		}
		if err := s.trees.MkdirAll(path.Dir(to), 0o755); err != nil {
			return err
		}
		if err := s.trees.Rename(from, to); err != nil {
			return err
		}
	}
	return s.bringBack(aside, to)
}

// bringBack moves those entries of aside into dir that dir lacks: what the new
// image has in a kept path and the old one had not.
func (s *syncer) bringBack(aside, dir string) error {
	info, err := s.trees.Lstat(aside)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return nil
	}
	if err != nil {
		return err
	}
	if info, err := s.trees.Lstat(dir); err != nil || !info.IsDir() {
		return err
	}
	entries, err := fs.ReadDir(s.trees.FS(), aside)
	if err != nil {
		return err
	}
	for _, e := range entries {
		from, to := path.Join(aside, e.Name()), path.Join(dir, e.Name())
		there, err := exists(s.trees, to)
		if err != nil {
			return err
		}
		if there {
			err = s.bringBack(from, to)
		} else {
			err = s.trees.Rename(from, to)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mergeAccounts carries accounts made by hand over to the new tree.
func (s *syncer) mergeAccounts(j journal) (kept, conflicts []string, err error) {
	oldRoot, err := s.trees.OpenRoot(j.From)
	if err != nil {
		return nil, nil, err
	}
	defer oldRoot.Close()
	newRoot, err := s.trees.OpenRoot(j.To)
	if err != nil {
		return nil, nil, err
	}
	defer newRoot.Close()
	old, err := readAccounts(oldRoot)
	if err != nil {
		return nil, nil, err
	}
	mine, err := readAccounts(newRoot)
	if err != nil {
		return nil, nil, err
	}
	rec, err := s.record(j.From)
	if err != nil {
		return nil, nil, err
	}
	kept, conflicts = mine.carryOver(old)
	kept = slices.DeleteFunc(kept, func(what string) bool { // these are cluster.yaml's, not made by hand
		return slices.Contains(rec.Users, strings.TrimPrefix(what, "account "))
	})
	// The new tree's accounts that came from cluster.yaml are those of the
	// old tree, until configure has looked at them.
	newRec, err := s.record(j.To)
	if err != nil {
		return nil, nil, err
	}
	newRec.Users = rec.Users
	if err := s.writeRecord(j.To, newRec); err != nil {
		return nil, nil, err
	}
	return kept, conflicts, mine.write(newRoot)
}

// overlayAgain puts the overlay once more over the moved paths, which came
// without the new overlay's files. A resumed switch may be for another image
// than the one at hand; then the record says that the overlay is missing, and
// the update that follows brings the one at hand.
func (s *syncer) overlayAgain(ctx context.Context, step *progress.Step, id string) error {
	rec, err := s.record(id)
	if err != nil {
		return err
	}
	if rec.Overlay != plainDigest(s.in.Image.Overlay.Digest) {
		rec.Overlay = ""
		return s.writeRecord(id, rec)
	}
	opt := tarfs.Options{Owner: true, Kept: s.kept, NoXattr: s.loose, Replace: true, Match: func(name string) bool {
		return slices.ContainsFunc(keptPaths(), func(p string) bool { return name == p || strings.HasPrefix(name, p+"/") })
	}}
	return extract(ctx, step, s.in.Image.Overlay, filepath.Join(s.dir, id), opt)
}

func device(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Dev }

func owner(info fs.FileInfo) [2]int {
	st := info.Sys().(*syscall.Stat_t)
	return [2]int{int(st.Uid), int(st.Gid)}
}
