import EdgeLlamaCore
import SwiftUI

/// What a bundle's manifest says, and what can be done with it.
struct BundleView: View {
    let directory: URL
    @State private var bundle: ModelBundle?
    @State private var backend: Backend?
    @State private var error: String?

    var body: some View {
        List {
            if let error: String = error { ErrorText(error) }
            if let bundle: ModelBundle = bundle {
                summary(bundle)
                choice(bundle)
                if let classifier: Classifier = bundle.classifier { labels(classifier) }
                if let backend: Backend = backend { actions(backend, classifies: bundle.classifier != nil) }
            }
        }
        .navigationTitle(directory.deletingPathExtension().lastPathComponent)
        .task { read() }
    }

    private func read() {
        if bundle != nil { return }
        do {
            let found: ModelBundle = try Storage.bundle(directory)
            bundle = found
            backend = Backend.all(of: found).first
            if backend == nil { error = "This bundle has no artifact that an iOS device runs.\nExport it with -t xnnpack or -t coreml." }
        } catch let found {
            error = sentence(found)
        }
    }

    private func summary(_ bundle: ModelBundle) -> some View {
        Section("Model") {
            LabeledContent("Name", value: bundle.name)
            LabeledContent("Parameters", value: String(format: "%.1f million", Double(bundle.parameters) / 1e6))
            LabeledContent("Recipe", value: bundle.recipe)
            LabeledContent("Context", value: "\(bundle.contextLength) tokens")
            if let version: Int = bundle.version { LabeledContent("Version", value: String(version)) }
            LabeledContent("Licence", value: bundle.license ?? "not stated")
        }
    }

    private func choice(_ bundle: ModelBundle) -> some View {
        Section("Runs in") {
            Picker("Runs in", selection: $backend) {
                ForEach(Backend.all(of: bundle)) { (backend: Backend) in
                    Text(backend.label).tag(Optional(backend))
                }
            }
            .pickerStyle(.inline)
            .labelsHidden()
            if let backend: Backend = backend { details(bundle, backend) }
        }
    }

    @ViewBuilder
    private func details(_ bundle: ModelBundle, _ backend: Backend) -> some View {
        if let artifact: Artifact = try? bundle.artifact(backend.target) {
            LabeledContent("File", value: "\(megabytes(artifact.bytes)), \(artifact.schemes.joined(separator: ", "))")
            LabeledContent("Memory, estimated", value: megabytes(artifact.peakBytes))
            LabeledContent("Made for", value: "\(artifact.runtime) \(artifact.minVersion)")
        }
        if let accuracy: Accuracy = bundle.accuracy(backend.target) {
            LabeledContent(
                "KL at export",
                value: String(format: "%.4f [%.4f, %.4f], %@", accuracy.klMean, accuracy.klLow, accuracy.klHigh, accuracy.verdict)
            )
        }
        if let warning: String = backend.warning(bundle) {
            Label(warning, systemImage: "info.circle").font(.footnote)
        }
    }

    private func labels(_ classifier: Classifier) -> some View {
        Section("Labels") {
            Text(classifier.labels.map { $0.name }.joined(separator: ", "))
            if let policy: Guard = classifier.policy {
                ForEach(policy.categories, id: \.code) { (category: GuardCategory) in
                    LabeledContent(category.code, value: category.name)
                }
            }
        }
    }

    private func actions(_ backend: Backend, classifies: Bool) -> some View {
        Section {
            if classifies {
                NavigationLink("Classify") {
                    ClassifyView(screen: ClassifyScreen(directory: directory, backend: backend))
                }
            } else {
                NavigationLink("Chat") { ChatView(screen: ChatScreen(directory: directory, backend: backend)) }
            }
            NavigationLink("Accuracy check") {
                AccuracyView(screen: AccuracyScreen(directory: directory, backend: backend))
            }
            NavigationLink("Benchmark") {
                BenchmarkView(screen: BenchmarkScreen(directory: directory, backend: backend))
            }
        }
    }
}
