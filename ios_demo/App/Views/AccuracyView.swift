import EdgeLlamaCore
import SwiftUI
import UniformTypeIdentifiers

struct AccuracyView: View {
    @State private var screen: AccuracyScreen
    @State private var picks: Bool = false

    init(screen: AccuracyScreen) {
        _screen = State(initialValue: screen)
    }

    var body: some View {
        List {
            if let error: String = screen.error { ErrorText(error) }
            if let result: GoldenResult = screen.result { verdict(result) }
            if screen.isBusy {
                ProgressView(value: Double(screen.done), total: Double(screen.positions))
                    .accessibilityLabel("Accuracy check")
                    .accessibilityValue("\(screen.done) of \(screen.positions) positions")
            }
            LinesText(screen.lines)
        }
        .navigationTitle("Accuracy check")
        .toolbar {
            if let file: URL = screen.file { ShareLink("Share the result", item: file) }
            if !screen.isBusy { Button("Challenge", systemImage: "questionmark.square.dashed") { picks = true } }
            RunButton(isBusy: screen.isBusy, start: { screen.start() }, stop: { screen.stop() })
        }
        .fileImporter(isPresented: $picks, allowedContentTypes: [.json]) { (picked: Result<URL, any Error>) in
            if case .success(let file) = picked { screen.start(challenge: file) }
        }
        .onDisappear { screen.stop() }
    }

    private func verdict(_ result: GoldenResult) -> some View {
        Label(
            result.passed ? "PASS" : "FAIL",
            systemImage: result.passed ? "checkmark.seal.fill" : "xmark.seal.fill"
        )
        .font(.title2)
        .foregroundStyle(result.passed ? Color.green : Color.red)
        .accessibilityLabel(result.passed ? "The check passed" : "The check failed")
    }
}

/// Lines of a report, in letters of one width.
struct LinesText: View {
    private let lines: [String]

    init(_ lines: [String]) {
        self.lines = lines
    }

    var body: some View {
        Text(lines.joined(separator: "\n"))
            .font(.footnote.monospaced())
            .textSelection(.enabled)
    }
}

/// Starts, or stops what runs.
struct RunButton: View {
    let isBusy: Bool
    let start: () -> Void
    let stop: () -> Void

    var body: some View {
        if isBusy {
            Button("Stop", systemImage: "stop.fill", action: stop)
        } else {
            Button("Start", systemImage: "play.fill", action: start)
        }
    }
}
